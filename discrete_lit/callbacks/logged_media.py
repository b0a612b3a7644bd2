"""Write pictures, clips, sounds and texts to the loggers of a run that show them: TensorBoard and Weights & Biases.

Other loggers of Lightning get numbers and settings alone.
"""

from io import BytesIO

import numpy as np
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue] (made at run time)


def log_picture(trainer: Trainer, tag: str, picture: np.ndarray) -> None:
    """Log a picture at the trainer's step.

    Args:
        trainer: whose loggers are written to.
        tag: name of the picture.
        picture: `(H, W, C)` uint8, C of 1 (grey), 3 (RGB) or 4 (RGBA).
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, picture, trainer.global_step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            # From an array W&B guesses a range of values; an image has one.
            shown = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
            logger.log_image(tag, [shown], trainer.global_step)


def log_gif(trainer: Trainer, tag: str, gif: bytes, *, size: tuple[int, int, int]) -> None:
    """Log an animated GIF, which both play, at the trainer's step.

    Args:
        trainer: whose loggers are written to.
        tag: name of the clip.
        gif: the file's content.
        size: `(H, W, C)` of a frame.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # What `add_video` writes, which needs moviepy to encode it.
            height, width, channels = size
            shown = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=gif)
            summary = Summary(value=[Summary.Value(tag=tag, image=shown)])
            logger.experiment._get_file_writer().add_summary(summary, trainer.global_step)
        elif isinstance(logger, WandbLogger):
            logger.log_video(tag, [BytesIO(gif)], trainer.global_step, format=["gif"])


def log_sound(trainer: Trainer, tag: str, waveform: np.ndarray, *, sample_rate: int) -> None:
    """Log a sound of one channel at the trainer's step.

    Args:
        trainer: whose loggers are written to.
        tag: name of the sound.
        waveform: `(T,)` float32 in [-1, 1].
        sample_rate: samples a second.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_audio(tag, waveform, trainer.global_step, sample_rate=sample_rate)
        elif isinstance(logger, WandbLogger):
            logger.log_audio(tag, [waveform], trainer.global_step, sample_rate=[sample_rate])


def log_text(trainer: Trainer, tag: str, text: str) -> None:
    """Log a text at the trainer's step.

    Args:
        trainer: whose loggers are written to.
        tag: name of the text.
        text: TensorBoard reads Markdown.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, text, trainer.global_step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(tag, columns=["step", "text"], data=[[str(trainer.global_step), text]])
