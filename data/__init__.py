import os

# A PNG of 50 KB can claim a billion pixels, for which each process that decodes it would take 6 GB. OpenCV refuses
# images of more pixels than this (800 MB); it reads the variable when it is imported. Phones' largest photos have 200
# million.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 28))
