"""Jobs on a Slurm cluster: scripts are rendered from templates/, checked settings are frozen beside them."""
