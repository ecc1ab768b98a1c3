"""Run a stage on a compute cluster of Azure ML: submit it, watch it, and fetch what it made."""
