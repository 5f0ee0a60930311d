import os

# A PNG of 50 KB can claim 400 million pixels, for which each process that decodes it takes 2 GB. OpenCV refuses images
# of more pixels than this (400 MB); it reads the variable when it is imported. Cameras' photos have 100 million.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 27))
