"""Images and masks that are damaged, odd or lie about themselves."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image, features

from flawsift.testing import SIZE
from tools.campaign.material import BACKBONE, Material, fresh_copy
from tools.campaign.mutate import Generator, change_bytes
from tools.campaign.outcome import Answer, Outcome, command, judged

ODD = "odd"  # begins the name of the mutated image
CLOSE = 3  # decimals of a score that do not depend on which images share a batch


class Images:
    """One odd image among good ones: the others keep their scores, and it is listed or has the score of its pixels."""

    name = "images"

    def __init__(self, material: Material, work: Path) -> None:
        self.material, self.folder, self.out = material, work / "parts", work / "out"
        self.bases = _encodings(Image.open(material.parts / "part-03.png").convert("RGB"))
        self.folder.mkdir(parents=True)
        for n in (0, 1, 12):
            name = f"part-{n:02d}.png"
            (self.folder / name).write_bytes((material.parts / name).read_bytes())
        self.set = work / "set"
        self.expected = self._view(self._predicted().result)
        self.expected_metrics = self._evaluated().result

    def try_one(self, draw: Generator) -> Outcome:
        """Mutate one image, or one mask, and use it."""
        names = list(self.bases)
        base = names[int(draw.integers(len(names)))]
        content = self.bases[base]
        if draw.random() < 0.15:
            what, changed = _lying_head(base, content, draw)
        else:
            what, changed = change_bytes(content, draw, [self.bases[n] for n in names])
        ending = names[int(draw.integers(len(names)))] if draw.random() < 0.2 else base
        what = f"{base} named .{ending.partition('-')[0]}: {what}"
        if draw.random() < 0.15:
            return self._try_mask(changed, what)
        path = self.folder / f"{ODD}.{ending.partition('-')[0]}"
        path.write_bytes(changed)
        try:
            if draw.random() < 0.2:
                return self._try_screening(what, path.name)
            return self._try_prediction(what, path, changed)
        finally:
            path.unlink()

    def _predicted(self) -> Answer:
        return command("predict", self.material.model, self.folder, "--runtime", "torch", "--json")

    def _evaluated(self) -> Answer:
        fresh_copy(self.material.labelled, self.set) if not self.set.exists() else None
        return command("evaluate", self.material.model, self.set, "--out", self.out, "--runtime", "torch", "--json")

    @staticmethod
    def _view(result: Any) -> Any:
        """Scores of the images that were not touched."""
        return {one["path"]: round(one["score"], CLOSE) for one in result["images"] if not one["path"].startswith(ODD)}

    def _try_prediction(self, what: str, path: Path, content: bytes) -> Outcome:
        answer = self._predicted()
        outcome = judged(answer, self.expected, what, [path.name], is_checked=True, view=self._view)
        if outcome.kind not in ("same", "told"):
            return outcome
        mine = [one for one in answer.result["images"] if one["path"].startswith(ODD)]
        if not mine:
            return Outcome("fault", what, "the image was lost without a word")
        if any("error" in one for one in mine):
            return Outcome("told", what, mine[0].get("error", ""))
        if not all(np.isfinite(one["score"]) for one in mine):
            return Outcome("fault", what, f"a score is no number: {mine}")
        wanted = _by_pillow(content)
        if wanted is None or len(mine) > 1:
            return Outcome("valid", what, "read as another picture")
        alone = self.folder.parent / "alone.png"
        wanted.save(alone)
        by_pixels = command("predict", self.material.model, alone, "--runtime", "torch", "--json").result["images"][0]
        if abs(by_pixels["score"] - mine[0]["score"]) > 1e-3 * by_pixels["score"]:
            return Outcome("fault", what, f"another score than that of its pixels: {mine[0]} instead of {by_pixels}")
        return Outcome("same", what, "the score of its pixels")

    def _try_screening(self, what: str, name: str) -> Outcome:
        arguments = ("--out", self.out / "s", *BACKBONE, "--cache", self.out / "cache", "--json")
        answer = command("screen", self.folder, *arguments)
        return judged(answer, 3, what, [name], is_checked=False, view=lambda result: int(result["n_images"]))

    def _try_mask(self, content: bytes, what: str) -> Outcome:
        """A mask may be read in another way, left out and named, or refused; the scores of images stay."""
        mask = next(iter(sorted((self.set / "ground_truth" / "bad").iterdir())))
        whole = mask.read_bytes()
        mask.write_bytes(content)
        try:
            answer = self._evaluated()
        finally:
            mask.write_bytes(whole)
        expected = self.expected_metrics["image_auroc"]
        outcome = judged(
            answer, expected, f"mask {what}", [mask.name], is_checked=True, view=lambda result: result["image_auroc"]
        )
        if outcome.kind != "same" or answer.result["n_without_mask"] == self.expected_metrics["n_without_mask"]:
            changed = outcome.kind == "same" and answer.result != self.expected_metrics
            return Outcome("valid", outcome.what, "another mask") if changed else outcome
        return Outcome("told", outcome.what, "counted as an image without a mask")


def _by_pillow(content: bytes) -> Image.Image | None:
    """The picture that Pillow alone reads, where its pixels leave nothing to interpret."""
    try:
        image = Image.open(io.BytesIO(content))
        if image.getexif().get(0x0112, 1) != 1 or getattr(image, "n_frames", 1) > 1 or image.format == "TIFF":
            return None
        image.load()
    except Exception:  # noqa: BLE001  # whatever another library does with damage is no matter here
        return None
    plain = image.mode in ("L", "RGB", "1") and "transparency" not in image.info
    deep = content.startswith(b"\x89PNG") and content[24:25] == b"\x10"
    return image.convert("RGB") if plain and not deep else None


def _lying_head(base: str, content: bytes, draw: Generator) -> tuple[str, bytes]:
    """A head that claims another size, with checksums that fit."""
    edge = (0, 1, 2**15, 2**20, 2**31 - 1)[int(draw.integers(5))]
    if content.startswith(b"\x89PNG"):
        head = b"IHDR" + struct.pack(">II", edge, SIZE) + content[24:29]
        return f"claims a width of {edge}", content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]
    if base.startswith("p"):
        return f"claims a width of {edge}", content.replace(b"64", str(edge).encode(), 1)
    at = int(draw.integers(2, 40))
    return f"claims {edge} at byte {at}", content[:at] + struct.pack("<I", edge % 2**32) + content[at + 4 :]


def _encodings(picture: Image.Image) -> dict[str, bytes]:
    """One picture in many formats and modes; keys begin with the file's ending."""
    grey, made = picture.convert("L"), dict[str, bytes]()
    ways: dict[str, Callable[[io.BytesIO], object]] = {
        "png": lambda f: picture.save(f, "PNG"),
        "png-grey": lambda f: grey.save(f, "PNG"),
        "png-16": lambda f: Image.fromarray(np.asarray(grey, np.uint16) * 257).save(f, "PNG"),
        "png-palette": lambda f: picture.quantize(16).save(f, "PNG", transparency=3),
        "png-alpha": lambda f: picture.convert("RGBA").save(f, "PNG"),
        "png-bits": lambda f: grey.convert("1").save(f, "PNG"),
        "jpg": lambda f: picture.save(f, "JPEG"),
        "jpg-cmyk": lambda f: picture.convert("CMYK").save(f, "JPEG"),
        "jpg-turned": lambda f: picture.save(f, "JPEG", exif=_turned()),
        "bmp": lambda f: picture.save(f, "BMP"),
        "gif": lambda f: picture.save(f, "GIF"),
        "gif-frames": lambda f: grey.save(f, "GIF", save_all=True, append_images=[grey.rotate(90)]),
        "webp": lambda f: picture.save(f, "WEBP"),
        "ppm": lambda f: picture.save(f, "PPM"),
        "pgm": lambda f: grey.save(f, "PPM"),
        "tga": lambda f: picture.save(f, "TGA"),
        "tif": lambda f: picture.save(f, "TIFF"),
        "tif-lzw": lambda f: picture.save(f, "TIFF", compression="tiff_lzw"),
        "tif-16": lambda f: tifffile.imwrite(f, np.asarray(grey, np.uint16) * 257),
        "tif-float": lambda f: tifffile.imwrite(f, np.asarray(grey, np.float32) / 255),
        "tif-pages": lambda f: tifffile.imwrite(f, np.stack([np.asarray(grey)] * 3), photometric="minisblack"),
        "tif-tiles": lambda f: tifffile.imwrite(f, np.asarray(picture), tile=(16, 16), compression="zlib"),
    }
    if features.check("avif"):
        ways["avif"] = lambda f: picture.save(f, "AVIF")
    if features.check("jpg_2000"):
        ways["jp2"] = lambda f: picture.save(f, "JPEG2000")
    for name, write in ways.items():
        file = io.BytesIO()
        write(file)
        made[name] = file.getvalue()
    return made


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif
