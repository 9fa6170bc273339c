"""Loading what others published, in SAELens' loader protocols.

`from_pretrained` picks the converter from the files. The converters by name work in SAELens' own calls:
`SAE.from_pretrained(repo, folder, converter=authors_huggingface_loader)` and
`SAE.load_from_disk(folder, converter=authors_disk_loader)`.
"""

from saelens_cosine.loading.errors import CheckpointError
from saelens_cosine.loading.formats.authors import AUTHORS
from saelens_cosine.loading.formats.dictionary_learning import DICTIONARY_LEARNING
from saelens_cosine.loading.formats.format import Format
from saelens_cosine.loading.formats.saelens import inference_form
from saelens_cosine.loading.formats.sparsify import SPARSIFY
from saelens_cosine.loading.pretrained import FORMATS, from_pretrained
from saelens_cosine.loading.releases import RELEASES

authors_disk_loader, authors_huggingface_loader = AUTHORS.disk_loader, AUTHORS.huggingface_loader
dictionary_learning_disk_loader = DICTIONARY_LEARNING.disk_loader
dictionary_learning_huggingface_loader = DICTIONARY_LEARNING.huggingface_loader
sparsify_disk_loader, sparsify_huggingface_loader = SPARSIFY.disk_loader, SPARSIFY.huggingface_loader

__all__ = [
    "FORMATS",
    "RELEASES",
    "CheckpointError",
    "Format",
    "authors_disk_loader",
    "authors_huggingface_loader",
    "dictionary_learning_disk_loader",
    "dictionary_learning_huggingface_loader",
    "from_pretrained",
    "inference_form",
    "sparsify_disk_loader",
    "sparsify_huggingface_loader",
]
