"""A tensor-parallel Llama-family decoder over ``communicators`` and ``kvcache_ops``."""
