"""Real data and small networks to try pruning on: what `python train.py` trains. The library does not need them."""
