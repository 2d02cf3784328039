"""Which GPUs reach each other: topology, the read-back probe, and its cache."""
