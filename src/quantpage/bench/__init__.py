"""What the kernels reach on this machine: cases as data, rows as CSV, pictures from the CSV."""
