"""What a run shows and leaves behind.

console.py      lines on the terminal, and one of progress below them
lines.py        what they say
metrics.py      metrics.jsonl, a row for each update, evaluation and sample
logs.py         the same rows for TensorBoard or Weights & Biases, where asked for
artefacts.py    weights, plot, samples and report, when it is done
sizes.py        every preset's parameters, and the memory that training it takes
"""
