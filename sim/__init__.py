"""What would happen: a deterministic simulator of LLM serving engines.

Start with `engine.py` (the loop of one engine on a virtual clock), then `schedulers/vllm.py` (who runs at each
step) and `kv/` (which blocks they get). `latency/` says how long a step takes, `simulate.py` joins it all.
"""
