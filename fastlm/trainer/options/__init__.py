"""What a person may ask of a command.

    training.py   the flags of every run that trains, as the fields of a dataclass
    config.py     those of `fastlm pretrain`, checked
    finetune.py   those of `fastlm finetune`
    folders.py    likewise of the commands that read a run's folder
    data.py       those of `fastlm data`
    reproduce.py  those of `fastlm reproduce`
    flags.py      dataclasses → flags, --help and refusals in one line
    files.py      flags from a file, by --config
    recipes.py    whole recipes of flags, by name
    assigned.py   options of what a flag names, NAME=VALUE each
    choices.py    the names a flag may take, known before anything heavy is imported
    plugins.py    a user's own modules, which add names

In goes a command line; out comes a Config. To add a flag, add a field to config.py.
"""
