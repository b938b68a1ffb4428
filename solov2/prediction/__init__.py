"""What `solov2 predict` does with many images: sources, output formats, resuming, videos."""
