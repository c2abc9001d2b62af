"""Several processes that train one model, on torch's engine, started by torchrun.

ranks.py     the processes, and what they tell one another
shards.py    how a model and its optimizer are divided among them: DDP, ZeRO 1, FSDP2
"""
