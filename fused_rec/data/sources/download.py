"""Download of public datasets from their publishers: python -m fused_rec.data.sources.download NAME [--out DIR].

Publishers give no checksums, and distribute the same text with different line ends. So the SHA-256 sums here are of
single files without carriage returns, computed from the copies on which the readers are tested. A file without a sum
is only checked for completeness.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from absl import app, flags

from fused_rec.data.sources.fetch import DownloadError, digest, fetch, unpack, verify
from fused_rec.storage import scratch

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """File or archive at a publisher.

    Attributes:
      url: its address.
      path: its path below the output folder; for an archive, the folder of its members.
      sha256: digest of the file without carriage returns, empty without a trusted copy.
      members: for an archive, the required files and their digests.
    """

    url: str
    path: str
    sha256: str = ""
    members: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Publication:
    """Dataset as its publisher offers it.

    Attributes:
      sources: its files and archives.
      reader: name of its reader, for `data.name`.
      terms: summary of its terms of use, which does not replace them.
    """

    sources: tuple[Source, ...]
    reader: str
    terms: str


def _github(repository: str, folder: str, path: str, sums: Mapping[str, str]) -> tuple[Source, ...]:
    root = f"https://raw.githubusercontent.com/{repository}/{folder}"
    return tuple(Source(f"{root}/{name}", f"{path}/{name}", sha256) for name, sha256 in sums.items())


HETREC = Source(
    "https://files.grouplens.org/datasets/hetrec2011/hetrec2011-lastfm-2k.zip",
    "lastfm",
    members={
        "artists.dat": "c173881362c6b28551368fecb3c0be5a6a30a6cd859e1f5775413dfe46d48648",
        "tags.dat": "c815d7216101fd0ba9b9c59fa2a011998d2fd076e0064d281ec4153d95ae8095",
        "user_artists.dat": "254272fa721c3935e8be286d28c051b206844307128698ab4eaa41d483379416",
        "user_friends.dat": "0360883a3557776e04fdebda851f2e5dd23e796cad7059b968acdebd528d13fa",
        "user_taggedartists.dat": "c4a9ffae9ab47a9f9b2f0678ab1f7e5c1db4ca818837d8cddd1f5699c5bbf048",
    },
)
LASTFM_TERMS = "non-commercial use (HetRec 2011: Cantador, Brusilovsky, Kuflik)"

PUBLICATIONS: dict[str, Publication] = {
    "lastfm": Publication((HETREC,), "lastfm", LASTFM_TERMS),
    "lastfm_sociallgn": Publication(
        (
            HETREC,
            *_github(
                "leo0481/SocialLGN",
                "7be7b0d7604f4d678ac7b8687fc240f96c93619a/data/preprocessed/lastfm",
                "lastfm/sociallgn_split",
                {
                    "train_set.txt": "195a7806d5b04e0a25cec4bf1c0775d9e4558ce2bba42217c39e75cdff215943",
                    "test_set.txt": "bf7b0b48502bf87b045a6f2fa94057e5b1ba4c0a6f9631f9965305e263e37ee2",
                    "trust.txt": "c95a9387fa52226d08abd0e3642b9c3ad102d1beb539ea76330e15ccc1a1e139",
                },
            ),
            *_github(
                "leo0481/SocialLGN",
                "f844a417a9ae0402ee4593ff4d21fba2f5b17cb9/data/preprocessed/lastfm",
                "lastfm/sociallgn_split",
                {
                    "userReindex.json": "eeb3c26cea6d256545cd7061e283b407071f645ea53f0b49dd5451d43fad64e3",
                    "itemReindex.json": "37a45b9dfb17de6c5e1167b0d8cc01904d88d6912965bfc1b9a7e4703d9f1c29",
                },
            ),
        ),
        "lastfm_sociallgn",
        LASTFM_TERMS,
    ),
    "lastfm_lightgcn": Publication(
        (
            HETREC,
            *_github(
                "gusye1234/LightGCN-PyTorch",
                "ef7aae37fc51973feabfc7e534720ea51f9eedf6/data/lastfm",
                "lastfm/lightgcn_split",
                {
                    "data1.txt": "15d45d21149cf0340a4f901fceae31bae313aa2cd1f346a4c728e55685289432",
                    "test1.txt": "0e49491e70101693871a1890ad1d68f75a45f05067516a2ac24b8e464d7b4195",
                    "trustnetwork.txt": "eb2f3eb5dbee61161923d0231874cce574c33cea8b9f331d912b1642a1cd29ba",
                },
            ),
        ),
        "lastfm_lightgcn",
        LASTFM_TERMS,
    ),
    "gowalla": Publication(
        _github(
            "gusye1234/LightGCN-PyTorch",
            "master/data/gowalla",
            "gowalla",
            {
                "train.txt": "7244696fdeb23911319cf7b689f2e15a3c4c92549c873a5677b44e3f13cc3e62",
                "test.txt": "099a2a73924e4b754dc6efd730d764f492321b53c38eb93298850c83acf57be3",
            },
        ),
        "lightgcn_text",
        "research use (Cho, Myers, Leskovec, KDD 2011; split of NGCF, Wang et al., SIGIR 2019)",
    ),
    "ml_100k": Publication(
        _github(
            "RUCAIBox/RecBole",
            "v1.2.0/recbole/dataset_example/ml-100k",
            "ml_100k",
            {
                "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
                "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
                "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
            },
        ),
        "recbole",
        "GroupLens research licence (Harper, Konstan, 2015), as RecBole atomic files",
    ),
    "amazon_musical_instruments": Publication(
        (
            Source(
                "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/reviews_Musical_Instruments_5.json.gz",
                "amazon_musical_instruments/reviews_Musical_Instruments_5.json.gz",
            ),
        ),
        "amazon",
        "research use (McAuley et al., SIGIR 2015); holds reviewers' names, which the reader does not read",
    ),
}


def download(publication: Publication, out: Path) -> list[Path]:
    """Downloads the files of a publication that are missing or differ from the published ones.

    Args:
      publication: the dataset.
      out: folder of all datasets.

    Returns:
      Paths of the files.

    Raises:
      DownloadError: a transfer failed, or a file differs from the published one.
    """
    files = []
    for source in publication.sources:
        wanted = {out / source.path / name: sha256 for name, sha256 in source.members.items()}
        wanted = wanted or {out / source.path: source.sha256}
        if not all(file.is_file() and (not sha256 or digest(file) == sha256) for file, sha256 in wanted.items()):
            if source.members:
                _install(source, out)
            else:
                fetch(source.url, out / source.path, sha256=source.sha256)
        files += wanted
    return files


def fetch_dataset(name: str, out: str | os.PathLike[str] | None = None) -> Path:
    """Downloads a dataset, for `load_dataset` or `config.data.path`; existing files are verified and kept.

    Args:
      name: a key of `PUBLICATIONS`.
      out: folder of all datasets; None = $FUSED_REC_DATA, or `data` if that is not set.

    Returns:
      The folder of the dataset.

    Raises:
      ValueError: the name is unknown.
      DownloadError: as in `download`.

    Example:
      dataset = fr.load_dataset("lastfm", path=fr.fetch_dataset("lastfm"))
    """
    if name not in PUBLICATIONS:
        offered = ", ".join(f"{known} ({publication.terms})" for known, publication in PUBLICATIONS.items())
        raise ValueError(f"no download is called {name!r}; there are {offered}")
    root = Path(out if out is not None else os.environ.get("FUSED_REC_DATA", "data")).expanduser()
    publication = PUBLICATIONS[name]
    LOG.info("%s: %s", name, publication.terms)
    download(publication, root)
    return (root / PurePosixPath(publication.sources[0].path).parts[0]).resolve()


def _install(source: Source, out: Path) -> None:
    """Downloads an archive and moves its required members into place after all of them are verified."""
    archive = out / PurePosixPath(source.url).name
    fetch(source.url, archive)
    with scratch(archive) as unpacked:
        try:
            unpack(archive, unpacked)
            for name, sha256 in source.members.items():
                if not (unpacked / name).is_file():
                    raise DownloadError(f"{archive.name} holds no {name}")
                verify(unpacked / name, name, sha256)
        finally:
            archive.unlink()
        for name in source.members:
            (out / source.path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(unpacked / name, out / source.path / name)


def main(argv: list[str]) -> None:
    """Downloads the publication named by the argument, and prints how to read it."""
    if len(argv) != 2 or argv[1] not in PUBLICATIONS:
        names = "\n".join(f"  {name}  ({publication.terms})" for name, publication in PUBLICATIONS.items())
        raise app.UsageError(f"name one of\n{names}")
    name, out = argv[1], Path(flags.FLAGS.out).expanduser()
    publication = PUBLICATIONS[name]
    print(f"{name}: {publication.terms}")
    try:
        files = download(publication, out)
    except DownloadError as error:
        sys.exit(str(error))
    print("\n".join(str(file) for file in files))
    print(f"Read it with FUSED_REC_DATA={out.resolve()} and --config.data.name={publication.reader}")


if __name__ == "__main__":
    flags.DEFINE_string("out", os.environ.get("FUSED_REC_DATA", "data"), "the folder that holds the datasets")
    app.run(main)
