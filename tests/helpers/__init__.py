"""What tests share: small corpora, models and recipes; a Slurm; trials of faults and of bad inputs."""
