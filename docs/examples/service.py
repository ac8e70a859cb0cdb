"""A web service that says what an image shows.

    pip install "minibeit[examples]"
    MODEL=microsoft/beit-base-patch16-224 uvicorn --app-dir docs/examples service:app
    curl -F image=@photo.jpg http://localhost:8000/classify

`MODEL` is a checkpoint for classification; without it the included model reads handwritten digits.
"""

import io
import os

import numpy as np
from fastapi import FastAPI, HTTPException, UploadFile
from PIL import Image
from pydantic import BaseModel

from minibeit import BeitForImageClassification, BeitImageProcessor, ImageError
from minibeit.catalogue import weights_folder

FOLDER = os.environ.get("MODEL", str(weights_folder() / "digits"))
MOST_BYTES = 20_000_000  # of a file that somebody sends

processor = BeitImageProcessor.from_pretrained(FOLDER)
model = BeitForImageClassification.from_pretrained(FOLDER)
app = FastAPI(title="What does it show?")


class Label(BaseModel):
    label: str
    probability: float


@app.post("/classify")
def classify(image: UploadFile, top: int = 5) -> list[Label]:
    """The `top` most probable labels.  FastAPI runs this in one of its threads, several at a time if need be."""
    data = image.file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise HTTPException(413, f"expected at most {MOST_BYTES} bytes")
    try:
        inputs = processor(Image.open(io.BytesIO(data)), return_tensors="np")
    except (ImageError, OSError, Image.DecompressionBombError):
        raise HTTPException(422, "expected an image in a format that Pillow reads") from None
    logits = model(**inputs).logits[0].astype(np.float64)
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    best = np.argsort(-shares)[: max(top, 1)]
    return [Label(label=model.config.id2label[int(i)], probability=float(shares[i])) for i in best]
