# mmpretrain's runtime settings, and what the plugin adds to them: the import
# of mdeq_mm, and the hook that lets checkpoints load where PyTorch refuses
# them.
default_scope = 'mmpretrain'
custom_imports = dict(imports=['mdeq_mm'], allow_failed_imports=False)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=100),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='VisualizationHook', enable=False),
    # An entry here and not in custom_hooks: a config that sets its own
    # custom_hooks replaces the whole list, while this dict is merged.
    guard=dict(type='CheckpointGuardHook'),
    failure=dict(type='FailureReportHook'),
    exact_resume=dict(type='ExactResumeHook'),
    caption=dict(type='EquilibriumCaptionHook'),
    # Looks at the image files first; on_error='skip' leaves out the unfit ones.
    data=dict(type='DataGuardHook'),
)

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)

vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='UniversalVisualizer', vis_backends=vis_backends)

log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
