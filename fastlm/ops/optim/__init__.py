"""Updates of many tensors at once, which fastlm/optim calls.

sgd.py  adamw.py  lamb.py  adafactor.py    one update each
unscale.py                                 norm, clip factor and overflow in one read of the gradients
update.py  lists.py  sums.py               what updates share: schemas, layouts for launchers, sums over shards
precision.py                               16-bit parameters: masters, remainders, stochastic rounding
"""
