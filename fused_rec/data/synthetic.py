"""Generator of a synthetic financial market with known latent factors, to check models without real data.

Five latent factors determine what a user buys, and no single source reveals them all:

- The text of an item states its theme, region, risk and style (income or growth), but not its concern. Only the
  concern distinguishes items with equal descriptions.
- The text of a user states some of their factors.
- Social edges (referrals) connect mostly users of the same concern, and interactions spread along them.
- Interactions depend on all factors, with noise. Half of the users have nine items or fewer.
- Reviews repeat the factors of the item and sometimes name the concern.

So text, social edges and interactions each rank moderately well, and best in combination. Timestamps carry no
information about preferences. All names, texts and numbers are invented.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from fused_rec.data.dataset import Dataset
from fused_rec.rng import numbered_rng

START = 1_609_459_200  # 2021-01-01 00:00 UTC
SECONDS = 1095 * 86_400  # three years

THEMES = (  # sector, phrases of items, phrases of users
    ("clean energy", ("wind and solar parks", "renewable power and grid storage"), ("clean energy", "wind and sun")),
    ("healthcare", ("hospitals and medicines", "biotechnology and medical devices"), ("medicine", "healthcare")),
    ("technology", ("software and microchips", "cloud computing and semiconductors"), ("technology", "software")),
    ("consumer", ("household brands and retailers", "food, fashion and leisure"), ("big brands", "retail chains")),
    ("infrastructure", ("toll roads, ports and airports", "railways and utilities"), ("infrastructure", "transport")),
    ("real estate", ("rental homes and offices", "warehouses and shopping centres"), ("property", "real estate")),
    ("banking", ("banks and insurers", "lenders and payment companies"), ("banks", "the financial sector")),
    ("commodities", ("gold and precious metals", "copper, oil and raw materials"), ("gold", "commodities")),
    ("government debt", ("government bonds", "treasury bills and sovereign debt"), ("state bonds", "public debt")),
    ("agriculture", ("farmland and crops", "fertiliser, seeds and food processing"), ("farming", "agriculture")),
    ("water", ("water supply and purification", "desalination and waste water"), ("clean water", "water supply")),
    ("small firms", ("small growing companies", "start-ups and young firms"), ("young companies", "small firms")),
)
REGIONS = (
    ("Europe", ("across Europe", "in the euro area")),
    ("North America", ("in North America", "in the United States and Canada")),
    ("Asia", ("in emerging Asia", "in India and South-East Asia")),
    ("Japan", ("in Japan", "on the Tokyo market")),
    ("Latin America", ("in Latin America", "in Brazil, Chile and Mexico")),
    ("Global", ("all over the world", "worldwide")),
)
CATEGORIES = (
    ("fund", ("An actively managed fund that invests in", "This mutual fund holds")),
    ("ETF", ("An exchange-traded fund that tracks an index of", "A low-cost index tracker for")),
    ("bond", ("A corporate bond that finances", "Fixed-interest debt issued to finance")),
    ("structured note", ("A structured note linked to", "A certificate whose return depends on")),
    ("deposit", ("A term deposit that is lent on to", "Savings at a fixed rate that finance")),
    ("pension", ("A pension plan invested in", "Retirement savings placed in")),
    ("insurance", ("A life insurance policy invested in", "Unit-linked insurance based on")),
)
RISKS = (  # by risk_band - 1: phrases of items, phrase of users
    (("Capital is protected and prices hardly move", "Very low risk of loss"), "I cannot afford any loss"),
    (("Low risk with small price swings", "Defensive and steady"), "I prefer to play it safe"),
    (("Moderate risk with occasional setbacks", "Medium volatility"), "I accept some ups and downs"),
    (("High risk, prices swing widely", "Suited to those who can bear large losses"), "I can live with large swings"),
    (("Speculative, a total loss is possible", "Very high risk and leverage"), "I enjoy taking big risks"),
)
STYLES = (
    (("It pays a regular income every quarter", "It distributes all dividends and coupons"), "a regular income"),
    (("It aims at long-term growth of capital", "It reinvests every gain for growth"), "growth over many years"),
)
CONCERNS = (  # phrase of users, phrase of reviews of matching items
    ("a good mobile app", "it is easy to handle on the phone"),
    ("personal advice", "the adviser explains everything in the branch"),
    ("low fees", "there are hardly any charges"),
    ("tax reporting", "the tax statement arrives complete and early"),
    ("quick access", "money can be withdrawn within a day"),
    ("ethical screening", "weapons and tobacco are strictly excluded"),
    ("small savings plans", "monthly plans start with tiny amounts"),
    ("a way to pass wealth on", "children can be named as heirs at once"),
    ("clear reports", "the quarterly letter is plain and honest"),
    ("currency hedging", "exchange rates are hedged without fuss"),
    ("local projects", "projects in the neighbourhood get the money"),
    ("a loyalty bonus", "patient savers receive a bonus each year"),
)
WORK = ("I work in a hospital", "I run a bakery", "I teach at a school", "I trained as an engineer", "I drive a lorry",
        "I keep the books of a small firm", "I design gardens", "I bring up two children")  # fmt: skip
AGES = ("18-29", "30-44", "45-59", "60-74", "75+")
JURISDICTIONS = ("AT", "CA", "CH", "DE", "FR", "GB", "SG")
OPENINGS = ("I bought this for {}.", "My stake in {}.", "Added because I believe in {}.", "A building block for {}.")
PRAISE = ("It suits me: {}.", "I chose it because {}.", "Very pleased that {}.")
BLAME = ("I miss {} here.", "Fine otherwise, but nothing is done for {}.", "Others offer {}.")


class LatentFactors(NamedTuple):
    """Latent factors of n users or items.

    Attributes:
      theme: int64 [n], index into THEMES.
      region: int64 [n], index into REGIONS.
      risk: int64 [n], index into RISKS.
      style: int64 [n], index into STYLES.
      concern: int64 [n], index into CONCERNS.
    """

    theme: Int64[np.ndarray, "n"]
    region: Int64[np.ndarray, "n"]
    risk: Int64[np.ndarray, "n"]
    style: Int64[np.ndarray, "n"]
    concern: Int64[np.ndarray, "n"]


def sample_latent_factors(seed: int, n_users: int, n_items: int) -> tuple[LatentFactors, LatentFactors]:
    """Samples the true factors behind `make_synthetic` with the same arguments.

    Args:
      seed: of the generator.
      n_users: number of users.
      n_items: number of items.

    Returns:
      The factors of the users and of the items.
    """
    users, items = (
        LatentFactors(*(rng.integers(0, len(facet), n) for facet in (THEMES, REGIONS, RISKS, STYLES, CONCERNS)))
        for rng, n in ((numbered_rng(seed, 0), n_users), (numbered_rng(seed, 1), n_items))
    )
    return users, items


def make_synthetic(seed: int = 0, n_users: int = 2000, n_items: int = 400) -> Dataset:
    """Generates a market with texts, interactions over three years, reviews and social edges.

    Equal arguments give equal data. Columns of the tables:

    - users: `user_id` C0001…, `text` (null for one in ten), `risk_tolerance` 1-5, `age_band`, `jurisdiction`;
    - items: `item_id` P001…, `name`, `text`, `category`, `sector`, `region`, `risk_band` 1-5;
    - interactions, reviews and ties (kind "referral"): sorted by `timestamp`, in unix seconds.

    Args:
      seed: of the generator.
      n_users: number of users, at least 20.
      n_items: number of items, at least 20.

    Returns:
      The dataset.

    Raises:
      ValueError: fewer than 20 users or items.
    """
    if min(n_users, n_items) < 20:
        raise ValueError(f"n_users is {n_users} and n_items {n_items}; a market needs at least 20 of each")
    users, items = sample_latent_factors(seed, n_users, n_items)
    rng = numbered_rng(seed, 2)
    source, target = _referrals(rng, users)
    user, item = _holdings(rng, users, items, source, target)
    joined, launched = _first_seconds(rng, n_users), _first_seconds(rng, n_items)
    held = _after(rng, np.maximum(joined[user], launched[item]), SECONDS)
    tied = _after(rng, np.maximum(joined[source], joined[target]), SECONDS * 3 // 4)
    reviewed, texts = _reviews(numbered_rng(seed, 5), users, items, user, item)
    wrote = held[reviewed] + rng.integers(3600, 60 * 86_400, len(reviewed))
    kind = np.full(len(source), "referral")
    return Dataset(
        name=f"synthetic-{seed}",
        users=_user_table(numbered_rng(seed, 3), users),
        items=_item_table(numbered_rng(seed, 4), items),
        interactions=_by_time(held, user=_int32(user), item=_int32(item)),
        reviews=_by_time(
            wrote, user=_int32(user[reviewed]), item=_int32(item[reviewed]), text=pa.array(texts, pa.string())
        ),
        ties=_by_time(tied, source=_int32(source), target=_int32(target), kind=pa.array(kind, pa.string())),
    )


def _first_seconds(rng: np.random.Generator, n: int) -> Int64[np.ndarray, "n"]:
    """Samples when users join or items launch, in seconds after START: half at 0, the rest over two years."""
    return rng.integers(0, SECONDS * 2 // 3, n) * (rng.random(n) < 0.5)


def _after(rng: np.random.Generator, since: Int64[np.ndarray, "_"], until: int) -> Int64[np.ndarray, "_"]:
    return since + (rng.random(len(since)) * (until - since)).astype(np.int64)


def _int32(values: Int64[np.ndarray, "_"]) -> pa.Array:
    return pa.array(values.astype(np.int32))


def _by_time(seconds: Int64[np.ndarray, "_"], **columns: pa.Array) -> pa.Table:
    return pa.table({**columns, "timestamp": START + seconds}).take(np.argsort(seconds, kind="stable"))


def _referrals(rng: np.random.Generator, users: LatentFactors) -> tuple[np.ndarray, np.ndarray]:
    """Samples distinct social edges (source, target); 85% have a target of the same concern."""
    n = len(users.theme)
    source = np.repeat(np.arange(n), np.minimum(rng.poisson(3, n), 12))
    by_concern = np.argsort(users.concern, kind="stable")
    size = np.bincount(users.concern, minlength=len(CONCERNS))
    own = users.concern[source]
    alike = by_concern[(np.cumsum(size) - size)[own] + rng.integers(0, size[own])]
    target = np.where(rng.random(len(source)) < 0.85, alike, rng.integers(0, n, len(source)))
    pairs = np.unique(np.stack([source, target], 1)[source != target], axis=0)
    return pairs[:, 0], pairs[:, 1]


def _holdings(
    rng: np.random.Generator, users: LatentFactors, items: LatentFactors, source: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Samples pairs (user, item) of highest utility; a Gumbel term makes this sampling without replacement."""
    from scipy.sparse import csr_matrix  # here: its import takes a fifth of a second

    n_users, n_items = len(users.theme), len(items.theme)
    utility = (
        3.0 * (users.theme[:, None] == items.theme)
        + 1.5 * (users.region[:, None] == items.region)
        - 0.4 * np.abs(users.risk[:, None] - items.risk)
        + 0.6 * (users.style[:, None] == items.style)
        + 2.0 * (users.concern[:, None] == items.concern)
        + rng.normal(0, 0.8, n_items)  # popularity independent of the factors
        + rng.gumbel(size=(n_users, n_items))
    )
    count = np.minimum(4 + rng.lognormal(1.65, 1.1, n_users).astype(np.int64), n_items // 4)
    wanted = np.argsort(np.argsort(-utility, axis=1), axis=1) < count[:, None]
    ends = np.concatenate([target, source]), np.concatenate([source, target])
    ties = csr_matrix((np.ones(len(ends[0])), ends), (n_users, n_users))
    n_tied = ties @ wanted.astype(np.float64)  # number of connected users with this item
    ranked = np.argsort(-(utility + 1.2 * np.minimum(n_tied, 2)), axis=1)
    held = np.arange(n_items) < count[:, None]
    return np.nonzero(held)[0], ranked[held]


def _pick(phrases: tuple[str, ...], number: int) -> str:
    return phrases[number % len(phrases)]


def _words(rng: np.random.Generator, n: int, columns: int) -> list[list[int]]:
    return rng.integers(0, 1 << 16, (n, columns)).tolist()


def _user_table(rng: np.random.Generator, users: LatentFactors) -> pa.Table:
    n = len(users.theme)
    tells = rng.random((n, 6)) < (1, 0.8, 0.5, 0.5, 0.6, 0.1)
    texts = []
    for (theme, region, risk, style, concern), tell, w in zip(
        zip(*users, strict=True), tells, _words(rng, n, 3), strict=True
    ):
        sentences = (
            _pick(WORK, w[0]),
            f"I take an interest in {_pick(THEMES[theme][2], w[1])}",
            f"I follow markets {_pick(REGIONS[region][1], w[2])}",
            RISKS[risk][1],
            f"I want {STYLES[style][1]}",
            f"I look for {CONCERNS[concern][0]}",
        )
        texts.append(" ".join(f"{sentence}." for sentence, included in zip(sentences, tell, strict=True) if included))
    return pa.table(
        {
            "user_id": [f"C{u + 1:04d}" for u in range(n)],
            "text": pa.array(texts, pa.string(), mask=rng.random(n) < 0.1),
            "risk_tolerance": _int32(users.risk + 1),
            "age_band": np.array(AGES)[rng.integers(0, len(AGES), n)],
            "jurisdiction": np.array(JURISDICTIONS)[rng.integers(0, len(JURISDICTIONS), n)],
        }
    )


def _item_table(rng: np.random.Generator, items: LatentFactors) -> pa.Table:
    n = len(items.theme)
    category = rng.integers(0, len(CATEGORIES), n)
    names, texts = [], []
    for i, (theme, region, risk, style, w) in enumerate(zip(*items[:4], _words(rng, n, 6), strict=True)):
        kind, openings = CATEGORIES[category[i]]
        label = f"{THEMES[theme][0].title()} {REGIONS[region][0]} {('Income', 'Growth')[style]}"
        names.append(f"{label} {kind if kind.isupper() else kind.title()} {i + 1}")
        what = f"{_pick(openings, w[0])} {_pick(THEMES[theme][1], w[1])} {_pick(REGIONS[region][1], w[2])}"
        how = [_pick(STYLES[style][0], w[3]), _pick(RISKS[risk][0], w[4])]
        texts.append(". ".join([what, *(how if w[5] % 2 else reversed(how))]) + ".")
    return pa.table(
        {
            "item_id": [f"P{i + 1:03d}" for i in range(n)],
            "name": names,
            "text": texts,
            "category": np.array([name for name, _ in CATEGORIES])[category],
            "sector": np.array([theme[0] for theme in THEMES])[items.theme],
            "region": np.array([name for name, _ in REGIONS])[items.region],
            "risk_band": _int32(items.risk + 1),
        }
    )


def _reviews(
    rng: np.random.Generator, users: LatentFactors, items: LatentFactors, user: np.ndarray, item: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """Samples the positions of the 30% of interactions with a review, and its text; 40% name the user's concern."""
    reviewed = np.flatnonzero(rng.random(len(user)) < 0.3)
    names_concern = rng.random(len(reviewed)) < 0.4
    texts = []
    for u, i, named, w in zip(
        user[reviewed], item[reviewed], names_concern, _words(rng, len(reviewed), 4), strict=True
    ):
        about = f"{_pick(THEMES[items.theme[i]][2], w[0])} {_pick(REGIONS[items.region[i]][1], w[1])}"
        text = _pick(OPENINGS, w[2]).format(about)
        if named:
            concern, met = CONCERNS[users.concern[u]]
            is_met = users.concern[u] == items.concern[i]
            text += " " + (_pick(PRAISE, w[3]).format(met) if is_met else _pick(BLAME, w[3]).format(concern))
        texts.append(text)
    return reviewed, texts
