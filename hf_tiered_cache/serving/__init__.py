"""An OpenAI-compatible server: transformers' own app and handlers over parked tiered caches.

Composed of transformers' parts, which stay as they are. From the top: `server` puts the parts
together; `admission` stands before the app and says who comes in, for how long, and what is
answered when something ends early; `handlers` keep slow work off the event loop; `generation` runs
transformers' `generate` with a parked cache, one forward at a time as `turns` says, on one thread;
`conversations` holds the caches between two turns of a chat; `requests` is one request's life;
`instruments` counts. Needs the extra: `pip install hf_tiered_cache[serve]`.
"""
