from vce_ray.cli import run

run()
