# mmseg's runtime settings and hooks, and what the plugin adds to them: the import
# of mdeq_mm, the hook that lets checkpoints load where PyTorch refuses them, and
# the one that looks at the data before training starts.
default_scope = 'mmseg'
custom_imports = dict(imports=['mdeq_mm'], allow_failed_imports=False)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
    # Entries here and not in custom_hooks: a config that sets its own
    # custom_hooks replaces the whole list, while this dict is merged.
    guard=dict(type='CheckpointGuardHook'),
    failure=dict(type='FailureReportHook'),
    exact_resume=dict(type='ExactResumeHook'),
    caption=dict(type='EquilibriumCaptionHook'),
    data=dict(type='DataGuardHook'),
)

env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)

vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(
    type='SegLocalVisualizer', vis_backends=vis_backends, name='visualizer'
)
log_processor = dict(by_epoch=False)
tta_model = dict(type='SegTTAModel')

log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
