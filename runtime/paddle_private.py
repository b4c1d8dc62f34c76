"""Every private name of Paddle's, and whatever differs between Paddle's versions: it stands here and nowhere else."""
