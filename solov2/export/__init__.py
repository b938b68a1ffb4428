"""Export: a model as one graph (`graph`), in files of several precisions (`files`, `quantize`), and their check in the
runtimes that run them (`runtimes`, `check`)."""
