"""StockNet (Xu and Cohen, 2018): who wrote about which ticker, company profiles, retweets; split by global time.

FUSED_REC_DATA=DIR python -m experiments.train --config=experiments/configs/stocknet.py --workdir=runs/stocknet

Half a minute on two CPU cores once the texts are encoded; test NDCG@10 .1363, Recall@10 .1444.
"""

from experiments.configs import config_dict


def get_config():
    """Settings chosen on validation."""
    return config_dict(
        data={"name": "stocknet", "core": 5},
        split={"kind": "time"},
        graph={"attributes": ("sector",)},
        # Most interactions are with few tickers, and unlike cosines dot products can say how popular one is.
        model={"score": "dot"},
        train={"temperature": 1.0, "learning_rate": 0.002, "eval_every": 10},
    )
