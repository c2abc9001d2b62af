"""What a run shows and leaves behind.

console.py      lines on the terminal
metrics.py      metrics.jsonl, a row for each update, evaluation and sample
artefacts.py    weights, plot, samples and report, when it is done
"""
