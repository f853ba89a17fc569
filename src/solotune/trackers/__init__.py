"""Send a run to TensorBoard, Weights & Biases, MLflow or Trackio (`report_to`), without any risk for the run.

    libraries         one class per tracker, three methods each, all calls of its library
    tracker_process   one process per tracker: it reads metrics.jsonl as it grows and calls the library
    observer          starts these processes, says once if one fails, and waits for them at the end, but not for long

Why processes, and not a thread with a queue: a library that hangs in native code holds Python's global lock, and with
it the run; one that crashes takes the run with it; and both Weights & Biases and MLflow wait in exit handlers for a
server that is gone. A process can do none of this. And the file is the queue: it loses nothing if a tracker is slow,
has no limit, and costs the training loop nothing.
"""
