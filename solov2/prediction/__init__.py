"""The parts of `solov2 predict`: sources, output formats, resuming, videos."""
