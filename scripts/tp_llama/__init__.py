"""A tensor-parallel Llama-family decoder over ``communicators`` and ``kvcache_ops``.

    python -m scripts.tp_llama --tp 2 --prompt "def main("

Reading order: job.py (what a rank does), model.py and layers.py (where it communicates),
generate.py and kv_cache.py (the paged batch), loader.py and partition.py (who holds what).
__main__.py, options.py, launch.py and verify.py are the command; train*.py made checkpoint/.
"""
