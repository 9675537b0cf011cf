"""The pose estimation network of SAM-6D (Lin et al., CVPR 2024), run from its released weights."""

VERSION = "1"  # version of the stored models; a new one onboards every object anew
