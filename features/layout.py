"""Names of everything that belongs to a feature set."""

import os

from features.packed import packed_folder, partial_folder
from features.pairs import features_folder, labels_folder
from features.store import manifest_file


class Layout:
    """The paths of the set NAME under FEATURES_PATH.

    Attributes:
        features, flipped, labels: folders of pairs. packed, partial: folder of shards, and where they are written.
        classes, manifest, checksums: files beside them.
        state: folder of an extraction that is not finished, with its settings and the list of its images.
    """

    def __init__(self, features_path, name):
        self.features_path, self.name = features_path, name
        self.features = features_folder(features_path, name)
        self.flipped = self.features + "_flip"
        self.labels = labels_folder(features_path, name)
        self.packed = packed_folder(features_path, name)
        self.partial = partial_folder(features_path, name)
        self.classes = self.path("classes.json")
        self.manifest = manifest_file(features_path, name)
        self.checksums = self.path("checksums.txt")
        self.state = self.path("extraction")
        self.settings = os.path.join(self.state, "settings.json")
        self.images = os.path.join(self.state, "images.npz")

    def path(self, what):
        """Returns the path of another file or folder of the set."""
        return os.path.join(self.features_path, f"{self.name}_{what}")
