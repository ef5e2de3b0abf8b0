"""Pictures of features: PCA maps, similarity maps, contact sheets of nearest neighbours.

Each function returns a PIL image, which notebooks display.
"""

from packvit.pictures.maps import draw_pca, draw_similarity
from packvit.pictures.neighbours import draw_neighbours

__all__ = ["draw_neighbours", "draw_pca", "draw_similarity"]
