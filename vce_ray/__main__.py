from vce_ray.cli.app import run

run()
