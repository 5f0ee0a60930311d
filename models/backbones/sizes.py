"""Image sizes of networks, and the sizes of their last feature maps."""

#: Height and width of a square image, or (height, width), pixels.
ImageSize = int | tuple[int, int]


def height_and_width(image_size: ImageSize) -> tuple[int, int]:
    """(height, width)."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def grid(image_size: ImageSize, stride: int, network: str) -> tuple[int, int]:
    """Rows and columns of the last feature map of `network`, which halves sizes down to a `stride`-th.

    Raises ValueError for a size that is not a multiple of `stride`.
    """
    height, width = height_and_width(image_size)
    for size in (height, width):
        if size < stride or size % stride:
            raise ValueError(f"{network} needs an image size that is a multiple of {stride}, got {size}")
    return height // stride, width // stride
