"""Many machines: who computes a stage, where a candidate is run, and what a worker can take."""
