"""The trainer: one run from its command line to its report.

    cli.py  flags.py  config.py  words.py        the commands, their flags as dataclasses, how refusals are said
    choices.py  plugins.py                       names that flags take, and a user's own modules that add to them
    data/                                        which text, what is held out, its tokens
    schedule.py  step.py                         learning rates; one update and one evaluation, and nothing around them
    budget.py  plan.py  checkpoint.py            minutes to steps; run.json; state on disk, without pickle
    run.py                                       a run from first line to last, and the same again from a checkpoint
    outputs/                                     what is said and written

Nothing below imports this room: the library and the models work without it. A new flag is a field of config.Config; a
new schedule a function in schedule.py."""
