"""The trainer: one run from its command line to its report.

    cli.py  words.py             the commands by their names; how refusals are said
    commands/                    what each command does
    options/                     every flag, the names that flags take, a user's own modules
    data/                        which text, what is held out, its tokens
    tasks/                       what is learned of labelled rows
    material.py                  what a run learns from, whichever of the two it is
    schedule.py  course.py       learning rates; how large each update is, and how long its rows
    step.py                      one update, and nothing around it
    evaluation.py                a loss over text that is held out
    budget.py  memory.py         minutes to steps; bytes, before there are any
    plan.py  checkpoint.py       run.json; state on disk, without pickle
    disk.py                      files that are whole or not there
    loop.py  signals.py          a run's steps and its end; what stops it
    patience.py                  when no better loss is to be waited for
    pull.py                      weights that are drawn back to where they began
    distributed/                 several processes that train one model, on torch's engine
    outputs/                     what is said and written
    reproduce/                   papers' tables and figures at a small size

Nothing below imports this room: the library and the models work without it. A new flag is a field of
options/config.Config, or of options/training.Training if all runs have it; a new schedule a function in schedule.py."""
