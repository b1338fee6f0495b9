"""flawsift in other libraries' interfaces, and their models behind ours.

anomalib  a model of anomalib as a detector ("anomalib:Padim"), and its exported files measured by our metrics
pyod      a model of PyOD as a detector ("pyod:IForest"), and our detectors as one of PyOD's
sklearn   our detectors as an estimator of scikit-learn
"""
