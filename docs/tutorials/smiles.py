# ---
# jupyter:
#   kernelspec: {name: python3, display_name: Python 3}
# ---
# %% [markdown]
# # From SMILES to DGL graphs
#
# A SMILES string says which atoms are bonded. A network of this package wants to know where they are. `ConformerGraph` goes the
# whole way: SMILES, a molecule with its hydrogens, conformers in space, and a graph whose edges connect what is close. It needs
# the extra `chem` (RDKit). This page looks at every step, and at what happens when a step fails.

# %%
import numpy as np

from ndem_zoo import ConformerGraph

featurizer = ConformerGraph(cutoff=5.0, seed=0)
aspirin = featurizer("CC(=O)Oc1ccccc1C(=O)O")
aspirin

# %% [markdown]
# ## What is in a graph
#
# A DGLGraph is two lists of nodes, `src` and `dst`, and columns of data for nodes (`ndata`) and edges (`edata`). Here nodes are
# atoms: first those of the SMILES, in its order, then the hydrogens that were added.

# %%
print("Z, atomic numbers:", aspirin.ndata["Z"].tolist())
print("R, positions (Å): ", tuple(aspirin.ndata["R"].shape), aspirin.ndata["R"].dtype)
src, dst = aspirin.edges()
print(f"{aspirin.num_nodes()} atoms, {aspirin.num_edges()} edges; the first goes from atom {src[0]} to atom {dst[0]}")

# %% [markdown]
# An edge goes from the neighbor, `src`, to the center, `dst`, and each pair within the cutoff has two, one for either
# direction. The vector of an edge is not stored: it is made from the positions, so that it can be differentiated.
# `edata["shift"]` is where periodic images come in; in a free molecule it is zero.

# %%
vectors = aspirin.ndata["R"][src] + aspirin.edata["shift"] - aspirin.ndata["R"][dst]
distances = vectors.norm(dim=1)
print(f"distances from {distances.min():.2f} to {distances.max():.2f} Å")

# %% [markdown]
# These edges are not bonds. A radius of 1.8 Å happens to find aspirin's 21 bonds, and three pairs of hydrogens in the methyl
# group that are none. With 5 Å most atoms see most of the others, and that is what the network needs: forces between atoms do
# not end where a chemist stops drawing lines.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt

COLORS = {1: "0.8", 6: "0.3", 8: "#D55E00"}


def draw(axis, graph, title: str) -> None:
    """The molecule in the plane in which it is widest, with its edges."""
    positions = graph.ndata["R"].numpy()
    _, _, axes = np.linalg.svd(positions - positions.mean(axis=0))
    plane = (positions - positions.mean(axis=0)) @ axes[:2].T
    for i, j in zip(*(nodes.tolist() for nodes in graph.edges()), strict=True):
        if i < j:
            axis.plot(*plane[[i, j]].T, color="#0072B2", linewidth=0.8, alpha=0.45, zorder=1)
    numbers = graph.ndata["Z"].tolist()
    axis.scatter(
        *plane.T,
        s=[60 if z == 1 else 170 for z in numbers],
        c=[COLORS[z] for z in numbers],
        edgecolors="black",
        zorder=2,
    )
    axis.set(title=f"{title}: {graph.num_edges()} edges", aspect="equal")
    axis.axis("off")


figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
for panel, cutoff in zip(panels, (1.8, 3.0, 5.0), strict=True):
    draw(panel, ConformerGraph(cutoff=cutoff, seed=0)("CC(=O)Oc1ccccc1C(=O)O"), f"cutoff {cutoff} Å")

# %% [markdown]
# ## Several molecules are one graph
#
# `dgl.batch` puts molecules beside each other, without edges between them, and that is all that batching means. What belongs to
# a whole structure, an energy, say, has no place in DGL but on nodes, so it is repeated on every atom.

# %%
import dgl

three = dgl.batch(list(featurizer.featurize(["CCO", "CC=O", "C1CC1"])))
print("atoms:", three.batch_num_nodes().tolist(), " edges:", three.batch_num_edges().tolist())
first = dgl.unbatch(three)[0]
print("back again:", first.ndata["Z"].tolist())

# %% [markdown]
# ## Conformers
#
# ETKDGv3 draws geometries with a fixed seed, MMFF94 cleans them up, and the lowest is kept. `keep="all"` keeps all of them, for
# molecules that are not rigid; then there are more graphs than molecules, and `report_.indices` says which belongs to which.

# %%
several = ConformerGraph(n_conformers=8, keep="all", seed=0)
conformers = several.featurize(["CCCCCC", "C1CC1"])
print("graphs:", len(conformers), " of molecule:", several.report_.indices.tolist())


def size(graph) -> float:
    """Radius of gyration in Å."""
    return float(graph.ndata["R"].sub(graph.ndata["R"].mean(dim=0)).square().sum(dim=1).mean().sqrt())


print("hexane:      ", [round(size(graph), 2) for graph in conformers[:8]], "Å")
print("cyclopropane:", [round(size(graph), 2) for graph in conformers[8:]], "Å")

# %% [markdown]
# A chain has folded and stretched conformers, a ring of three has one. Geometries and their order come from a force field: for a
# model that was trained on DFT geometries they are shifted a little.
#
# ## When it fails
#
# Featurizers elsewhere put an empty array where a molecule failed, and training fails later, somewhere else. Here it is an
# error, and one error lists all molecules that failed, each with its number and the reason.

# %%
from ndem_zoo.errors import DataError

smiles = ["CCO", "C1CC", "CC(=O)[O-]", "[Na+].[Cl-]", "C[CH2]", "FC(Cl)Br"]
try:
    featurizer.featurize(smiles)
except DataError as error:
    print(error)

# %% [markdown]
# In a long list some will fail, and one wants the rest. `on_failure="drop"` says so; the report has all the details, also of
# molecules that succeeded in another way than asked for, such as the last one, whose SMILES leaves open which mirror image it is.

# %%
import warnings

careful = ConformerGraph(on_failure="drop", seed=0)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the warning says what the report says
    graphs = careful.featurize(smiles)
print(careful.report_)

# %% [markdown]
# Charged molecules, radicals and pairs of ions are refused because nothing in the network knows of a charge or a spin: it
# would give acetate the energy of some other arrangement of these atoms. Who knows better writes `allow=("charge",)`.
#
# ## From graphs to training
#
# A list of graphs is what `fit` and `predict` take; labels are needed, of course. `to_dataset` makes a dataset of SMILES and
# labels at once, and keeps bonds, angles and rotors as further columns, for objectives that turn bonds.

# %%
dataset = ConformerGraph(seed=0).to_dataset(["CCO", "CC=O", "CCC"], {"gap": [13.1, 6.0, 12.9]})  # eV; invented
print(dataset)
for name, column in dataset.extras.items():
    print(f"{name:9s} {column.shape}")
rotors = dataset.extras["rotors"][0]
print("bonds of ethanol that can turn:", rotors[rotors[:, 0] >= 0][:, 1:3].tolist())

# %% [markdown]
# [QM9 from SMILES](qm9.py) trains on such graphs and predicts from SMILES; [from SMILES to graphs](../how-to/smiles.md) has all options in short.

# %% tags=["hide-input"]
import torch

assert ConformerGraph(cutoff=1.8, seed=0)("CC(=O)Oc1ccccc1C(=O)O").num_edges() == 2 * (21 + 3), (
    "bonds, and three more pairs"
)
assert aspirin.ndata["Z"][:13].tolist() == [6, 6, 8, 8, 6, 6, 6, 6, 6, 6, 6, 8, 8], "the order is that of the SMILES"
assert aspirin.num_nodes() == 21
assert float(distances.max()) < 5.0, "edges are within the cutoff"
pairs = set(zip(src.tolist(), dst.tolist(), strict=True))
assert all((j, i) in pairs for i, j in pairs), "each pair has an edge in either direction"
everywhere = torch.cdist(aspirin.ndata["R"], aspirin.ndata["R"])
assert len(pairs) == int((everywhere < 5.0).sum()) - 21, "and none is missing; an atom is not its own neighbor"
assert three.batch_num_nodes().tolist() == [9, 7, 9]
sizes = [[size(graph) for graph in part] for part in (conformers[:8], conformers[8:])]
assert np.ptp(sizes[0]) > 0.1 > 0.01 > np.ptp(sizes[1]), "a chain has shapes, a ring of three has one"
assert careful.report_.indices.tolist() == [0, 5], "what failed is left out, and said"
assert [outcome.index for outcome in careful.report_.failures] == [1, 2, 3, 4]
assert torch.equal(featurizer("CCO").ndata["R"], featurizer("CCO").ndata["R"]), "the same seed gives the same geometry"
