"""quire beside its peers on a CPU, in one run. See benchmarks/README.md."""
