"""Why a product is recommended: scores taken apart exactly, and what would change them."""
