"""What a run leaves as: an adapter, a merged model, a GGUF file, a folder for Ollama or vLLM; each compared with what
was trained.

    source.py             what is exported: a run, or an adapter folder that others trained
    export_plan.py        everything that can refuse an export, before anything is written
    write_artifacts.py    adapter and merged model, each written and compared; gguf_artifacts.py: GGUF and Ollama
    merge_choice.py       which base the adapter is merged into, by measurement
    artifact.py           what was written, and how near it is to the trained model
    serve.py, push.py     a server on an export; its upload

The package is not called `export`, because `solotune.export` is the function of that verb.
"""
