"""Python API, one file per verb: `solotune.api.train` is the file, `solotune.train` the function in it.

Heavy imports are inside the functions, so that a list of runs does not import torch.
"""
