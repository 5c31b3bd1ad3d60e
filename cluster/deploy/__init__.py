"""Files that start a cluster elsewhere, written from `ray_config.yaml`: KubeRay, Ray's cluster launcher, an image."""
