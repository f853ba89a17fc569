"""What a run leaves as: an adapter, a merged model, a GGUF file, a folder for Ollama or vLLM; each compared with what
was trained.

    source.py         what is exported: a run, or an adapter folder that others trained
    merge.py          the adapter added to a base's weights, shard by shard
    artifact.py       what was written, and how near it is to the trained model
    log_prob_error.py     how far two models' next-token distributions are apart

The package is not called `export`, because `solotune.export` is the function of that verb.
"""
