"""What each command does, from its flags to its last line.

run.py          `fastlm pretrain`, and `fastlm resume` of any run
finetune.py     `fastlm finetune`: labelled rows, from the weights of another run
sampling.py     `fastlm sample`: a trained model writes
predicting.py   `fastlm predict`: a fine-tuned one answers
evaluating.py   `fastlm evaluate`: a trained one is measured over a text
reproducing.py  `fastlm reproduce`: small counterparts of papers' tables and figures
data.py         `fastlm data`: its commands by their names
cleaning.py     `fastlm data clean`: what of a text is worth learning from
packing.py      `fastlm data pack`: text as ids, written once
inspecting.py   `fastlm data inspect`: what such a folder holds, and whether it is whole

opening.py      what a folder holds of a trained model
start.py        a run that begins with its weights
ready.py        a run begun, or read back from its folder
"""
