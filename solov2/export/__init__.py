"""Export: a model as one graph (`graph`), in files of several precisions (`files`, `quantize`), checked in the runtimes
that run them (`runtimes`, `check`)."""
