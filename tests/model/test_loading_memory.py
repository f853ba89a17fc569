"""Loading a streamed base holds its stored form and one layer in host memory, not the 16 bits of its files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers

MIB = 1 << 20
LOAD = """
import json, sys, threading, time
import torch
from solotune.config.load import load_config
from solotune.model import layers, loading

def anonymous():  # pages of files that are mapped do not count: the system takes them back
    lines = open("/proc/self/status")
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

keys = {"model_name_or_path": sys.argv[1], "dataset": "unused", "base_precision": "nf4", "use_cpu": True,
        "base_offload": True, "torch_compile": False, "lora_r": 4, "lora_target_modules": ["q_proj"], "max_length": 64}
config, before, seen, plain = load_config(keys), anonymous(), [0], layers.LayerRing

def watch():
    while seen[-1] is not None:
        seen[0] = max(seen[0], anonymous() - before)
        time.sleep(0.002)

def ring(*args, **keys):
    made = plain(*args, **keys)
    seen.append(None)  # what follows computes: on a GPU that takes no host memory
    return made

layers.LayerRing = ring
thread = threading.Thread(target=watch)
thread.start()
model = loading.load_model(config, torch.device("cpu"), torch.bfloat16)
thread.join()
rest = sum(p.numel() * p.element_size() for p in model.module.parameters())
print(json.dumps([seen[0], model.ring.num_bytes_on_host, len(model.layers), rest]))
"""


@pytest.mark.slow
def test_the_peak_while_loading_is_the_stored_form_and_one_layer(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=1024, hidden_size=1024, intermediate_size=4096, num_hidden_layers=18,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=128)  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    files = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, timeout=600, check=True
    )
    peak, stored, depth, rest = json.loads(done.stdout.splitlines()[-1])
    assert files > 570 * MIB and 140 * MIB < stored < 160 * MIB
    # on a CPU the two slots of the ring, and quantising (a 16-bit weight in float32), take host memory too
    assert peak < stored + rest + 3 * stored / depth + 40 * MIB
    assert peak < files / 2
