"""The benchmarks: `scripts/bench/run CASE`, one module a case in cases/, the peers in peers/.

Options, the format of the figures, tables and plots are those of `communicators bench`
(communicators/cli/bench), whose cases cpu and all_reduce are.
"""
