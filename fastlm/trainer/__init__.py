"""The trainer: one run from its command line to its report.

    cli.py  words.py                             the commands; how refusals are said
    options/                                     every flag, the names that flags take, a user's own modules
    data/                                        which text, what is held out, its tokens
    schedule.py  step.py                         learning rates; one update and one evaluation, and nothing around them
    budget.py  memory.py                         minutes to steps; bytes, before there are any
    plan.py  checkpoint.py                       run.json; state on disk, without pickle
    opening.py  start.py                         what a folder holds of a model, and a run that begins with its weights
    material.py                                  what a run learns from
    run.py  finetune.py  ready.py                the commands; a run begun, or read back from its folder
    loop.py  signals.py                          its steps and its end; what stops it
    distributed/                                 several processes that train one model, on torch's engine
    tasks/                                       what is learned of labelled rows
    evaluation.py  evaluating.py                 a loss over text, on the way and for a model that is trained
    sampling.py  predicting.py                   a trained model writes; a fine-tuned one answers
    outputs/                                     what is said and written

Nothing below imports this room: the library and the models work without it. A new flag is a field of
options/config.Config, or of options/training.Training if all runs have it; a new schedule a function in schedule.py."""
