"""Continual learning: small networks on a stream of tasks, many runs trained as one.

`datasets` and `streams` say what is learned, `networks` and `training` how, `signals` what is
measured on the way. All that differs between runs is a tensor whose first dimension is the runs.
"""
