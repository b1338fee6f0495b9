"""Screen, fit and predict on synthetic parts, and check against the truth. Runs offline in about a minute."""

import tempfile
from pathlib import Path

import flawsift
from flawsift.datasets import write_folder
from flawsift.datasets.synthetic import synthetic
from flawsift.metrics.ranking import image_auroc


def main() -> None:
    """120 parts, one in six defective, in a folder that does not say which."""
    with tempfile.TemporaryDirectory() as folder:
        data = synthetic(100, 20, size=128, seed=0, texture="weave")
        parts = write_folder(data, Path(folder) / "parts")
        backbone = flawsift.load_backbone(size=128)
        store = flawsift.FeatureStore(Path(folder) / "cache")

        screening = flawsift.screen(parts, backbone=backbone, store=store)
        fitted = flawsift.fit(parts, backbone=backbone, screening=screening, store=store)
        found = fitted.model.predict(parts)

        threshold = fitted.model.threshold()
        assert threshold is not None
        assert screening.contamination is not None
        labels = data.truth.select(found.ids).labels
        print(
            f"estimated share of defects: {screening.contamination.alpha_hat:.2f}, true: {data.truth.contamination:.2f}"
        )
        print(f"stage 1 finds them with AUROC {image_auroc(screening.consensus, labels):.3f}")
        print(f"the threshold stops about {threshold.per_hundred:.1f} of 100 good parts")


if __name__ == "__main__":
    main()
